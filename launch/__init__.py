"""Submission of runs to a cluster. The package starts processes and does not need torch."""

from shards import end_imports_quietly

end_imports_quietly(__name__)
