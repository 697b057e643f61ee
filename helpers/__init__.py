"""The helper module behind the notebooks. Imports run one way: notebooks -> helpers; inside helpers from rl and train down to facts."""
