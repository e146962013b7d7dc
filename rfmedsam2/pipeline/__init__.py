"""One verb, one public function each: what the commands do."""
