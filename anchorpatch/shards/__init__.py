"""The shard format: HDF5 files of patches, read by memory map."""
