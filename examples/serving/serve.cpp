// Serves a model without Python.
//
//   serve [--operators libmtlkernels.so] [--threads N] MODEL REQUEST...
//
// MODEL is a package of AOTInductor (.pt2), which holds fused operators and wants their library, or a TorchScript file
// (.pt), which holds operators of PyTorch alone. A REQUEST is a list or tuple of tensors that torch.save has written;
// the answer to request.pt is written to request.pt.answer, to be read by torch.load. Each request is then served again
// and again, and the median time is printed, in microseconds.

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Tensors = std::vector<at::Tensor>;
using Model = std::function<Tensors(const Tensors&)>;

// The tensors of a tuple or a list; `what` names it.
Tensors tensors_of(const c10::IValue& value, const std::string& what) {
  std::vector<c10::IValue> entries;
  if (value.isTuple()) {
    entries = value.toTuple()->elements().vec();
  } else if (value.isList()) {
    entries = value.toListRef().vec();
  } else {
    throw std::runtime_error(what + " must be a list or tuple of tensors, got " + value.tagKind());
  }
  Tensors tensors;
  for (const c10::IValue& entry : entries) {
    if (!entry.isTensor()) throw std::runtime_error(what + " must hold tensors, got " + entry.tagKind());
    tensors.push_back(entry.toTensor());
  }
  return tensors;
}

// The operators are known to every model from then on.
void load_operators(const std::string& path) {
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
}

Model load_package(const std::string& path) {
  try {
    auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
    return [loader](const Tensors& request) { return loader->run(request); };
  } catch (const c10::Error& error) {
    if (std::string(error.what()).find("mtlkernels::") == std::string::npos) throw;
    throw std::runtime_error(path + " needs the operators of mtlkernels: give --operators libmtlkernels.so (" +
                             error.what_without_backtrace() + ")");
  }
}

Model load_script(const std::string& path) {
  auto module = std::make_shared<torch::jit::Module>(torch::jit::load(path));
  module->eval();
  return [module](const Tensors& request) {
    const auto answer = module->forward({request.begin(), request.end()});
    return answer.isTensor() ? Tensors{answer.toTensor()} : tensors_of(answer, "the model's answer");
  };
}

Model load(const std::string& path) {
  return std::filesystem::path(path).extension() == ".pt2" ? load_package(path) : load_script(path);
}

Tensors read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return tensors_of(torch::jit::pickle_load(bytes), path);
}

void write(const std::string& path, const Tensors& tensors) {
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create({tensors.begin(), tensors.end()}));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

// The median of as many calls as take about half a second.
double microseconds(const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  const auto end = Clock::now() + std::chrono::milliseconds(500);
  do {
    const auto start = Clock::now();
    call();
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  } while (Clock::now() < end);
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

int number_of_threads(const std::string& text) {
  int count = 0;
  const char* const end = text.data() + text.size();
  const std::from_chars_result read = std::from_chars(text.data(), end, count);
  if (read.ec != std::errc() || read.ptr != end || count < 1) {
    throw std::runtime_error("--threads must be a number of at least 1, got " + text);
  }
  return count;
}

void serve(const std::vector<std::string>& arguments) {
  size_t next = 0;
  for (; next + 1 < arguments.size() && arguments[next].starts_with("--"); next += 2) {
    const std::string &option = arguments[next], &value = arguments[next + 1];
    if (option == "--operators") {
      load_operators(value);
    } else if (option == "--threads") {
      at::set_num_threads(number_of_threads(value));
    } else {
      throw std::runtime_error("unknown option " + option);
    }
  }
  if (arguments.size() < next + 2) throw std::runtime_error("a model and at least one request are wanted");
  const c10::InferenceMode inference;
  const Model model = load(arguments[next++]);
  for (; next < arguments.size(); ++next) {
    const Tensors request = read(arguments[next]);
    write(arguments[next] + ".answer", model(request));
    std::cout << request.at(0).size(0) << " " << microseconds([&] { model(request); }) << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    serve({argv + 1, argv + argc});
  } catch (const c10::Error& error) {
    std::cerr << "serve: " << error.what_without_backtrace() << std::endl;
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "serve: " << error.what() << std::endl;
    return 1;
  }
}
