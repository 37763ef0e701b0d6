// What a user's extension does with a tensor that pybind11 hands it; and `mark`, which torch built for CUDA binds itself.
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/utils/pybind.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("mark", [](size_t storage, std::string message) {
    reinterpret_cast<c10::StorageImpl*>(storage)->release_data_and_set_meta_custom_data_ptr_error_msg_(message);
  });
  m.def("writes", [](const at::Tensor& w) { return float(w.data_ptr<at::BFloat16>()[0]); });
  m.def("address", [](const at::Tensor& w) { return float(static_cast<at::BFloat16*>(w.data_ptr())[0]); });
  m.def("storage", [](const at::Tensor& w) { return float(static_cast<const at::BFloat16*>(w.storage().data())[0]); });
  m.def("reads", [](const at::Tensor& w) { return float(w.const_data_ptr<at::BFloat16>()[0]); });
  m.def("square", [](const at::Tensor& w) { return at::mul(w, w); });
  m.def("product", [](const at::Tensor& w) { return at::mm(w, w.t()); });
}
