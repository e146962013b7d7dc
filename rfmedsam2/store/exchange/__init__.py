"""Label maps in the formats of other programs: names, colors and codes of the labels in the file; DICOM-SEG read."""
