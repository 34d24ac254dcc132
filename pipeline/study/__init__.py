"""Studies: from a study config to cells, from their records to fits, figures and a report."""
