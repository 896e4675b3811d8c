"""Small mistakes put into leafnet one at a time, to see which of them the tests notice."""
