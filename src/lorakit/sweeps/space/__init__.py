"""What is swept: the values of recipe keys, how they are drawn, and the recipes they make."""
