"""Files of records: dataclasses as JSON, verified folders, and text tables."""
