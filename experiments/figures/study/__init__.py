"""Does curvature between layers help? The study's records to tables and figures, one question at a time."""
