"""The shell: everything asynchronous, everything timed."""
