"""Inputs of the benchmarks: made-up studies, caches and photographs, and an object store."""
