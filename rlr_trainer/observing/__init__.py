"""What a run shows: callbacks, files, pictures, warnings, and the report."""
