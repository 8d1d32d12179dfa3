# SPDX-License-Identifier: Apache-2.0
"""The demonstrations: everything from raw data to the answers of a released model, by the public commands alone."""
