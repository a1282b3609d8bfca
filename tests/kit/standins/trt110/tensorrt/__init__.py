"""TensorRT 11.0's names, as far as an engine needs any.

Source: the bindings at tag v11.1 of github.com/NVIDIA/TensorRT and the 11.0.0 release notes, of
which the facts table lists what disappeared: EXPLICIT_BATCH, the precision flags, calibrators. Bit
1 of the network's flags is another flag now, so that 1 << 1 for strong typing would be a mistake.
The names for DLAs are in NVIDIA's guide for 11.3, which says that this version finds none.
"""

import sys

from trt_core import install

install(
    sys.modules[__name__],
    dla=False,
    version="11.0.0",
    opset=24,
    sources="EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
    monitor=True,
    network_flags={"STRONGLY_TYPED": 0, "PREFER_JIT_PYTHON_PLUGINS": 1},
    builder_flags="""DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE
        DIRECT_IO VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS
        DISABLE_COMPILATION_CACHE STRIP_PLAN REFIT_IDENTICAL WEIGHT_STREAMING REFIT_INDIVIDUAL
        STRICT_NANS MONITOR_MEMORY EDITABLE_TIMING_CACHE DISTRIBUTIVE_INDEPENDENCE""",
    dtypes="FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0",
    names={
        "Builder": """create_network create_builder_config create_optimization_profile
            build_serialized_network num_DLA_cores max_DLA_batch_size""",
        "IBuilderConfig": """set_flag get_flag clear_flag set_memory_pool_limit
            get_memory_pool_limit create_timing_cache set_timing_cache get_timing_cache
            get_tactic_sources set_tactic_sources
            add_optimization_profile builder_optimization_level hardware_compatibility_level
            default_device_type DLA_core can_run_on_DLA set_device_type get_device_type
            progress_monitor runtime_platform max_num_tactics tiling_optimization_level""",
        "OnnxParser": """parse parse_from_file supports_model_v2 num_subgraphs num_errors get_error
            clear_errors load_model_proto load_initializer parse_model_proto set_builder_config""",
        "Runtime": """deserialize_cuda_engine engine_host_code_allowed load_runtime DLA_core
            num_DLA_cores""",
        "ICudaEngine": """num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype
            get_tensor_shape get_tensor_profile_shape create_execution_context
            device_memory_size_v2 weight_streaming_budget_v2 create_runtime_config
            get_aliased_input_tensor get_engine_stat""",
        "IExecutionContext": """set_input_shape set_tensor_address get_tensor_shape
            execute_async_v3 set_optimization_profile_async execute_v2 set_output_allocator
            set_device_memory""",
    },
)
