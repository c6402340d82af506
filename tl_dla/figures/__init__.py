"""What figures and pages are made of; `tl_dla/plots.py` and `tl_dla/report.py` join them."""
