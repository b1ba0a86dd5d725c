"""The fault campaign: runs that meet faults must resume and end the same."""
