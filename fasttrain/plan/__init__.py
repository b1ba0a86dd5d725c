"""Predict what a run needs, without a GPU and without allocating a tensor.

``trace`` and ``update`` make one step on tensors that have shapes only. ``ledger`` and ``group`` record what it does.
``memory``, ``communication`` and ``step_time`` turn the records into bytes and seconds for a GPU of ``hardware``.
``forecast`` combines them, and ``report`` prints the result.
"""
