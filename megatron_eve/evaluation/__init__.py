# SPDX-License-Identifier: Apache-2.0
"""Questions to a released folder and the scores of its answers: easy-VQA with right and wrong images, lmms-eval's
benchmarks, a checkpoint while its run goes on, and the figures that all of these write."""
