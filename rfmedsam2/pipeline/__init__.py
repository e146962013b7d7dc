"""The steps behind the commands: datasets, planning, preprocessing, training, prediction, evaluation, doctor."""
