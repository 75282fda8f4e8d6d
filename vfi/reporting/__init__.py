"""Reports on results: tables, charts, images and pages, and the acceptance of a phase."""
