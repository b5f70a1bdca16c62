"""Kernel latencies fitted to measurements: what is fitted, how, from what, and how good it is.

``geometry``          cases of decode attention, the GPU figures they need, and which kernel an engine sends them to
``attention_model``   the physical form of decode attention and its named parameters
``map_fit``           the fit: a maximum a posteriori estimate that outliers cannot pull
``samples``           measured points from CSV or JSONL, and which of them are refused
``attention_fit``     samples and priors in, a calibration out
``attention``         a calibration: predictions, intervals, slope ratios
``other_kernels``     all-reduce, and what fits of other kernels have in common; ``matrix_kernels``: GEMM and experts
``latent``            latent (MLA) decode attention: form, fit, predictions
``fields``            fields of JSON, checked as they are read
``schema``            the JSON form of a calibration
``store``             where calibrations lie: the user's folder first, then those that ship
``derive``            ``python -m kvplan.calibration.derive``: the shipped calibrations from public tables
``evaluate``          ``python -m kvplan.calibration.evaluate``: how good they are, by held-out rows
"""
