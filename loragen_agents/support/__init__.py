"""Files, the package's content folders, the console and progress: small helpers that know nothing of the project."""
