"""Programs that train, sample and evaluate models with continuous output on text."""
