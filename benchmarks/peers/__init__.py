"""vlmedge beside llama.cpp, onnxruntime-genai, OpenVINO, ONNX Runtime and PyTorch, in one run.

python -m benchmarks.peers               # everything: builds, exports, measures; hours
python -m benchmarks.peers --case vit-b-16 --rounds 10
python -m benchmarks.peers --redraw peers.json
"""
