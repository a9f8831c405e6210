"""A diff for people and for scripts: lines, a table, JSON, a page."""
