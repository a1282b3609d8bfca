"""TensorRT 10.3.0's names, as far as an engine needs any.

Source: the bindings at tag v10.3.0 of github.com/NVIDIA/TensorRT, of which the facts table lists
what appeared and disappeared: STRONGLY_TYPED is 1, BF16 and INT4 are there, the *_binding_* names
are gone.
"""

import sys

from trt_core import install

install(
    sys.modules[__name__],
    dla=True,
    version="10.3.0",
    opset=21,  # the table of 10.0 says 20, its change log INT4, which is an opset 21 type
    sources="CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
    monitor=True,
    network_flags={"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
    builder_flags="""FP16 INT8 DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS
        SAFETY_SCOPE OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO
        REJECT_EMPTY_ALGORITHMS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8
        ERROR_ON_TIMING_CACHE_MISS BF16 DISABLE_COMPILATION_CACHE STRIP_PLAN REFIT_IDENTICAL
        WEIGHT_STREAMING INT4 REFIT_INDIVIDUAL""",
    dtypes="FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4",
    names={
        "Builder": """create_network create_builder_config create_optimization_profile
            build_serialized_network platform_has_fast_fp16 platform_has_fast_int8 num_DLA_cores
            max_DLA_batch_size""",
        "IBuilderConfig": """set_flag get_flag clear_flag set_memory_pool_limit
            get_memory_pool_limit create_timing_cache set_timing_cache get_timing_cache
            get_tactic_sources set_tactic_sources
            add_optimization_profile builder_optimization_level hardware_compatibility_level
            default_device_type DLA_core can_run_on_DLA set_device_type get_device_type
            int8_calibrator set_calibration_profile algorithm_selector progress_monitor
            runtime_platform""",
        "OnnxParser": """parse parse_from_file supports_model supports_model_v2 num_subgraphs
            num_errors get_error clear_errors""",
        "Runtime": """deserialize_cuda_engine engine_host_code_allowed load_runtime DLA_core
            num_DLA_cores""",
        "ICudaEngine": """num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype
            get_tensor_shape get_tensor_profile_shape create_execution_context
            device_memory_size device_memory_size_v2 weight_streaming_budget_v2""",
        "IExecutionContext": """set_input_shape set_tensor_address get_tensor_shape
            execute_async_v3 set_optimization_profile_async execute_v2 set_output_allocator
            set_device_memory""",
    },
)
