"""SparseSSM: one-shot pruning of Mamba language models (arXiv 2506.09613), reproduced and extended.

Letters used for sizes throughout:

    B  batch (windows)            L  time steps of a window       T  time steps of a chunk of it
    D  d_inner, channels          N  d_state, states per channel  M  d_model
    R  dt_rank                    K  d_conv, taps of the convolution

and for the quantities of one selective scan (Gu and Dao 2023, section 3; docs/DESIGN.md has the formulas):

    A = -exp(A_log)  (D,N)        Abar_t = exp(dt_t A)  (D,N)     h_t  state after step t  (D,N)
"""

__version__ = "0.1.0"
