"""The run-time engine: attaches to a transformer, skips blocks, and undoes itself exactly."""
