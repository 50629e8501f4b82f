"""How an encoder is made: methods, data, augmentation, the loop, evaluation, recipes, and the theory behind them."""
