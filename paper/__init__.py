"""The paper, reproduced: experiments, stored results, the tables and figures made from them, and benchmarks."""
