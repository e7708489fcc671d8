"""The mathematics of Algorithm 1: torch only, no communication, no files, no clocks."""
