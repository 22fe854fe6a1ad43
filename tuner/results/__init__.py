"""WHAT CAME OUT: records, the store, ranking, queries, report."""
