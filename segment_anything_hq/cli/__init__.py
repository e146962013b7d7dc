"""Commands of the wing of natural images: samhq_train, samhq_evaluate, samhq_predict and others."""
