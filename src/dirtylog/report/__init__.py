"""What a recording shows: a page for the browser, and a picture for paper."""
