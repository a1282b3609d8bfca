"""TensorRT 8.6.1's names, as far as an engine needs any.

Source: the bindings at tag 8.6.1 of github.com/NVIDIA/TensorRT, of which the facts table lists what
appeared and disappeared: no strong typing, no progress monitor, no INT64, the *_binding_* names.
"""

import sys

from trt_core import install

install(
    sys.modules[__name__],
    dla=True,
    version="8.6.1",
    opset=17,
    sources="CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
    monitor=False,
    network_flags={"EXPLICIT_BATCH": 0},
    builder_flags="""FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32
        SPARSE_WEIGHTS SAFETY_SCOPE OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS
        DIRECT_IO REJECT_EMPTY_ALGORITHMS VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8""",
    dtypes="FLOAT HALF INT8 INT32 BOOL UINT8 FP8",
    names={
        "Builder": """create_network create_builder_config create_optimization_profile
            build_serialized_network platform_has_fast_fp16 platform_has_fast_int8 num_DLA_cores
            max_DLA_batch_size""",
        "IBuilderConfig": """set_flag get_flag clear_flag set_memory_pool_limit
            get_memory_pool_limit create_timing_cache set_timing_cache get_timing_cache
            get_tactic_sources set_tactic_sources set_preview_feature get_preview_feature
            add_optimization_profile builder_optimization_level hardware_compatibility_level
            default_device_type DLA_core can_run_on_DLA set_device_type get_device_type
            int8_calibrator set_calibration_profile algorithm_selector max_workspace_size""",
        "OnnxParser": "parse parse_from_file supports_model num_errors get_error clear_errors",
        "Runtime": """deserialize_cuda_engine engine_host_code_allowed load_runtime DLA_core
            num_DLA_cores""",
        "ICudaEngine": """num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype
            get_tensor_shape get_tensor_profile_shape create_execution_context num_bindings
            create_execution_context_without_device_memory
            get_binding_name get_binding_dtype get_binding_shape device_memory_size""",
        "IExecutionContext": """set_input_shape set_tensor_address get_tensor_shape
            execute_async_v3 set_optimization_profile_async execute execute_async execute_async_v2
            execute_v2 set_output_allocator device_memory""",
    },
)
