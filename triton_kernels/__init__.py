"""Triton kernels; installed as ``kd_kernels.triton_kernels`` (the bare name belongs to others).

Import them as that and through :mod:`kd_kernels.triton_runtime` only: importing Triton costs seconds.
"""
