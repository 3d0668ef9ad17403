"""What `edgectl doctor` knows and thinks: `facts` are what was seen, `gather` sees it, `checks` judges it."""
