"""Measuring the GPU at hand with kvplan's own decode kernels, and holding predictions against it.

``options``       what the caller said, and the request it makes on a device
``family``        what the kernels run: attention shapes of a rank, plain or latent, and KV formats
``plan``          which cells to time: families, batches, contexts, cut to memory
``backend``       what a device has to offer; ``cuda`` and ``cpu`` are the two there are
``run_folder``    the records of a run, written as they are taken
``run``           from options to the report
``runner``        gates, roofline, cells, peers, whole steps, under a time budget
``predict``       what kvplan would have said of each cell before it was timed
``analysis``      slopes, ratios, errors: from records to a report
``step_plan``     the whole decode step of a dense model: which, how predicted, which line
``fit``           the calibration that a run ends with
``records_page``  ``docs/measured.md`` from the records that ship, which ``shipped`` reads

Only ``cuda``, ``cpu``, ``accuracy``, ``dense_step`` and ``torch_peer`` import torch and the kernels that need it,
and they are imported when a run starts.
"""
