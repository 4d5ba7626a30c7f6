"""How good an adapter is: answers, metrics and losses, beside the bare base on the same rows."""
