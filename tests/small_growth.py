"""The program `growth` on one small model and two of its cases."""

from continuous_lm.experiments import growth, program
from tests import tiny

if __name__ == "__main__":
    growth.MODELS = {"small": tiny.llama_config(model_type="llama", num_hidden_layers=5)}
    growth.DEVICES = (1, 2)
    growth.cases = lambda: [
        growth.Case(tokens=16, points=4, data=2, model=2),
        growth.Case(tokens=32, points=4, data=1, model=1),
    ]
    program.run(growth.main)
