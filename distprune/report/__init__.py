"""A run, or several, on one page of HTML that needs no network."""
