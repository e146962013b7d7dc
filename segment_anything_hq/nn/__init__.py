"""Networks: SAM and SAM 2 as segmenters, and the refiners around them."""
