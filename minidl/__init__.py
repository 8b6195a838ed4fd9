from minidl.tensor import Tensor
import minidl.ops.elementwise as e
Tensor.__add__=e.add
Tensor.__mul__=e.mul
Tensor.__matmul__=e.matmul
Tensor.tanh=e.tanh
Tensor.T=property(lambda s:s)
