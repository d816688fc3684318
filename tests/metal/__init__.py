"""A stand-in for Metal on Linux: kernels are checked by clang and executed on the CPU."""
