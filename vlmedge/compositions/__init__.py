"""The built-in compositions, a JSON file each; `vlmedge.composition` says what stands in one."""
