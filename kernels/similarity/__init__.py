"""Row log-sum-exp of scaled similarities."""
