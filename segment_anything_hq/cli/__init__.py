"""Commands: samhq_train, samhq_evaluate, samhq_evaluate_coco, samhq_predict, samhq_check_data, samhq_summary."""
