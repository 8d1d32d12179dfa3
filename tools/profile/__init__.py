# SPDX-License-Identifier: Apache-2.0
"""Starts captures of training steps and reads them: Nsight Systems or torch.profiler, one report. docs/profiling.md"""
