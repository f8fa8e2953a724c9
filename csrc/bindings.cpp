// Addresses, integers and floats in; nothing of torch. The Python side keeps the memory alive and checks it.
#include <pybind11/pybind11.h>

#include "angle.h"
#include "distance.h"
#include "gather.h"
#include "gemm.h"
#include "gibbs.h"
#include "half_step.h"
#include "pairwise_l1.h"
#include "row_divergence.h"
#include "sinkhorn.h"
#include "sorted_l1.h"
#include "topk.h"

namespace py = pybind11;

namespace {

// Raised with every change to this file's signatures, or to what csrc/*.h says of a call; kd_kernels/native.py
// compares.
constexpr int kAbiVersion = 8;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A pointer member as a Python attribute that holds its address, 0 for null.
template <class Class, class T>
void def_pointer(py::class_<Class>& cls, const char* name, T* Class::* member) {
  cls.def_property(
      name, [member](const Class& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](Class& self, uintptr_t address) { self.*member = pointer<T>(address); });
}

// An enum member as a Python int.
template <class Class, class Enum>
void def_enum(py::class_<Class>& cls, const char* name, Enum Class::* member, int count) {
  cls.def_property(
      name, [member](const Class& self) { return static_cast<int>(self.*member); },
      [member, name, count](Class& self, int value) {
        if (value < 0 || value >= count)
          throw py::value_error(std::string(name) + " must be in [0, " + std::to_string(count) + "), got " +
                                std::to_string(value));
        self.*member = static_cast<Enum>(value);
      });
}

void def_side(py::module_& module) {
  using kd::Side;
  py::class_<Side> side(module, "Side");
  side.def(py::init<>());
  def_pointer(side, "logits", &Side::logits);
  def_enum(side, "dtype", &Side::dtype, kd::kDtypes);
  def_pointer(side, "offsets", &Side::offsets);
  side.def_readwrite("ld", &Side::ld);
  side.def_readwrite("scale", &Side::scale);
  side.def_readwrite("softcap", &Side::softcap);
  def_pointer(side, "temperature", &Side::temperature);
  def_pointer(side, "grad", &Side::grad);
  def_enum(side, "grad_dtype", &Side::grad_dtype, kd::kDtypes);
  def_pointer(side, "grad_offsets", &Side::grad_offsets);
  side.def_readwrite("grad_ld", &Side::grad_ld);
}

void def_row_divergence(py::module_& module) {
  using kd::RowDivergence;
  py::class_<RowDivergence> args(module, "RowDivergence");
  args.def(py::init<>());
  args.def_readwrite("n", &RowDivergence::n);
  args.def_readwrite("vocab", &RowDivergence::vocab);
  def_enum(args, "objective", &RowDivergence::objective, kd::kObjectives);
  args.def_readwrite("student", &RowDivergence::student);  // a reference: args.student.logits = ... works
  args.def_readwrite("teacher", &RowDivergence::teacher);
  def_pointer(args, "parameter0", &RowDivergence::parameter0);
  def_pointer(args, "parameter1", &RowDivergence::parameter1);
  def_pointer(args, "labels", &RowDivergence::labels);
  def_pointer(args, "soft_weight", &RowDivergence::soft_weight);
  def_pointer(args, "hard_weight", &RowDivergence::hard_weight);
  def_pointer(args, "statistics", &RowDivergence::statistics);
  def_pointer(args, "terms", &RowDivergence::terms);
  args.def_readwrite("entropies", &RowDivergence::entropies);
  args.def_readwrite("threads", &RowDivergence::threads);

  module.def("row_divergence", &kd::row_divergence, py::arg("args"), py::arg("phases"),
             py::call_guard<py::gil_scoped_release>());
}

void def_gather(py::module_& module) {
  using kd::Gather;
  py::class_<Gather> args(module, "Gather");
  args.def(py::init<>());
  args.def_readwrite("n", &Gather::n);
  args.def_readwrite("vocab", &Gather::vocab);
  args.def_readwrite("side", &Gather::side);
  args.def_readwrite("k", &Gather::k);
  def_pointer(args, "ids", &Gather::ids);
  def_pointer(args, "gathered", &Gather::gathered);
  def_pointer(args, "statistics", &Gather::statistics);
  args.def_readwrite("hard", &Gather::hard);
  args.def_readwrite("means", &Gather::means);
  def_pointer(args, "soft", &Gather::soft);
  def_pointer(args, "slope", &Gather::slope);
  def_pointer(args, "hard_weight", &Gather::hard_weight);
  def_pointer(args, "at_ids", &Gather::at_ids);
  args.def_readwrite("threads", &Gather::threads);

  module.def("gather", &kd::gather, py::arg("args"), py::arg("phases"), py::call_guard<py::gil_scoped_release>());
}

void def_pairwise_l1(py::module_& module) {
  using kd::PairwiseL1;
  py::class_<PairwiseL1> args(module, "PairwiseL1");
  args.def(py::init<>());
  args.def_readwrite("n", &PairwiseL1::n);
  args.def_readwrite("vocab", &PairwiseL1::vocab);
  args.def_readwrite("student", &PairwiseL1::student);
  args.def_readwrite("teacher", &PairwiseL1::teacher);
  args.def_readwrite("groups", &PairwiseL1::groups);
  args.def_readwrite("longest", &PairwiseL1::longest);
  def_pointer(args, "starts", &PairwiseL1::starts);
  def_pointer(args, "student_statistics", &PairwiseL1::student_statistics);
  def_pointer(args, "teacher_statistics", &PairwiseL1::teacher_statistics);
  def_pointer(args, "cost", &PairwiseL1::cost);
  def_pointer(args, "signs", &PairwiseL1::signs);
  def_pointer(args, "d_cost", &PairwiseL1::d_cost);
  def_pointer(args, "student_means", &PairwiseL1::student_means);
  def_pointer(args, "teacher_means", &PairwiseL1::teacher_means);
  args.def_readwrite("threads", &PairwiseL1::threads);

  module.def("pairwise_l1", &kd::pairwise_l1, py::arg("args"), py::arg("phases"),
             py::call_guard<py::gil_scoped_release>());
}

void def_sorted_l1(py::module_& module) {
  using kd::SortedL1, kd::SortedSide;
  py::class_<SortedSide> side(module, "SortedSide");
  side.def(py::init<>());
  side.def_readwrite("logits", &SortedSide::logits);
  side.def_readwrite("vocab", &SortedSide::vocab);
  def_pointer(side, "max", &SortedSide::max);
  def_pointer(side, "logz", &SortedSide::logz);
  def_pointer(side, "mass", &SortedSide::mass);
  def_pointer(side, "sum", &SortedSide::sum);

  py::class_<SortedL1> args(module, "SortedL1");
  args.def(py::init<>());
  args.def_readwrite("n", &SortedL1::n);
  args.def_readwrite("student", &SortedL1::student);
  args.def_readwrite("teacher", &SortedL1::teacher);
  def_pointer(args, "soft_weight", &SortedL1::soft_weight);
  def_pointer(args, "loss", &SortedL1::loss);
  def_pointer(args, "hard_weight", &SortedL1::hard_weight);
  def_pointer(args, "hard_logz", &SortedL1::hard_logz);
  def_pointer(args, "labels", &SortedL1::labels);
  args.def_readwrite("threads", &SortedL1::threads);
  args.def_property(
      "scratch", [](const SortedL1& self) { return reinterpret_cast<uintptr_t>(self.scratch); },
      [](SortedL1& self, uintptr_t address) { self.scratch = pointer<void>(address); });

  module.def("sorted_l1_scratch", &kd::sorted_l1_scratch, py::arg("args"));
  module.def("sorted_l1", &kd::sorted_l1, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

void def_topk(py::module_& module) {
  using kd::Topk;
  py::class_<Topk> args(module, "Topk");
  args.def(py::init<>());
  args.def_readwrite("n", &Topk::n);
  args.def_readwrite("vocab", &Topk::vocab);
  args.def_readwrite("side", &Topk::side);
  def_pointer(args, "temperatures", &Topk::temperatures);
  args.def_readwrite("temperature_count", &Topk::temperature_count);
  args.def_readwrite("k", &Topk::k);
  def_pointer(args, "ids", &Topk::ids);
  def_pointer(args, "values", &Topk::values);
  def_pointer(args, "statistics", &Topk::statistics);
  args.def_readwrite("target_count", &Topk::target_count);
  def_pointer(args, "targets", &Topk::targets);
  def_pointer(args, "target_values", &Topk::target_values);
  def_pointer(args, "target_ranks", &Topk::target_ranks);
  args.def_readwrite("sample_count", &Topk::sample_count);
  def_pointer(args, "uniforms", &Topk::uniforms);
  def_pointer(args, "samples", &Topk::samples);
  args.def_readwrite("threads", &Topk::threads);

  module.def("topk", &kd::topk, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

void def_angle(py::module_& module) {
  using kd::Angle;
  py::class_<Angle> args(module, "Angle");
  args.def(py::init<>());
  args.def_readwrite("n", &Angle::n);
  args.def_readwrite("ld", &Angle::ld);
  args.def_readwrite("beta", &Angle::beta);
  def_pointer(args, "student", &Angle::student);
  def_pointer(args, "student_inverse", &Angle::student_inverse);
  def_pointer(args, "teacher", &Angle::teacher);
  def_pointer(args, "teacher_inverse", &Angle::teacher_inverse);
  def_pointer(args, "sums", &Angle::sums);
  def_pointer(args, "student_grad", &Angle::student_grad);
  def_pointer(args, "teacher_grad", &Angle::teacher_grad);
  args.def_readwrite("threads", &Angle::threads);

  module.def("angle", &kd::angle, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

void def_distance(py::module_& module) {
  using kd::Distance;
  py::class_<Distance> args(module, "Distance");
  args.def(py::init<>());
  args.def_readwrite("n", &Distance::n);
  args.def_readwrite("ld", &Distance::ld);
  def_pointer(args, "numbers", &Distance::numbers);
  def_pointer(args, "student", &Distance::student);
  def_pointer(args, "teacher", &Distance::teacher);
  def_pointer(args, "statistics", &Distance::statistics);
  def_pointer(args, "terms", &Distance::terms);
  def_pointer(args, "student_grad", &Distance::student_grad);
  def_pointer(args, "teacher_grad", &Distance::teacher_grad);
  args.def_readwrite("threads", &Distance::threads);

  module.def("distance", &kd::distance, py::arg("args"), py::arg("phases"), py::call_guard<py::gil_scoped_release>());
}

void def_gibbs(py::module_& module) {
  using kd::Gibbs;
  py::class_<Gibbs> args(module, "Gibbs");
  args.def(py::init<>());
  args.def_readwrite("n", &Gibbs::n);
  args.def_readwrite("m", &Gibbs::m);
  args.def_readwrite("wide", &Gibbs::wide);
  args.def_readwrite("by_column", &Gibbs::by_column);
  args.def_readwrite("epsilon", &Gibbs::epsilon);
  def_pointer(args, "cost", &Gibbs::cost);
  args.def_readwrite("ld", &Gibbs::ld);
  def_pointer(args, "shift", &Gibbs::shift);
  def_pointer(args, "reach", &Gibbs::reach);
  def_pointer(args, "kernel", &Gibbs::kernel);
  def_pointer(args, "weighted", &Gibbs::weighted);
  args.def_readwrite("out_ld", &Gibbs::out_ld);
  args.def_readwrite("threads", &Gibbs::threads);

  module.def("gibbs", &kd::gibbs, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

void def_half_step(py::module_& module) {
  using kd::HalfStep;
  py::class_<HalfStep> args(module, "HalfStep");
  args.def(py::init<>());
  args.def_readwrite("count", &HalfStep::count);
  args.def_readwrite("n", &HalfStep::n);
  args.def_readwrite("m", &HalfStep::m);
  args.def_readwrite("wide", &HalfStep::wide);
  args.def_readwrite("transposed", &HalfStep::transposed);
  args.def_readwrite("divide", &HalfStep::divide);
  def_pointer(args, "kernel", &HalfStep::kernel);
  args.def_readwrite("ld", &HalfStep::ld);
  def_pointer(args, "x", &HalfStep::x);
  args.def_readwrite("x_ld", &HalfStep::x_ld);
  def_pointer(args, "weight", &HalfStep::weight);
  args.def_readwrite("weight_ld", &HalfStep::weight_ld);
  def_pointer(args, "extra", &HalfStep::extra);
  def_pointer(args, "out", &HalfStep::out);
  args.def_readwrite("out_ld", &HalfStep::out_ld);
  args.def_readwrite("threads", &HalfStep::threads);

  module.def("half_step", &kd::half_step, py::arg("args"), py::call_guard<py::gil_scoped_release>());
}

void def_sinkhorn(py::module_& module) {
  using kd::Sinkhorn;
  py::class_<Sinkhorn> args(module, "Sinkhorn");
  args.def(py::init<>());
  args.def_readwrite("count", &Sinkhorn::count);
  args.def_readwrite("n", &Sinkhorn::n);
  args.def_readwrite("m", &Sinkhorn::m);
  def_pointer(args, "cost", &Sinkhorn::cost);
  def_enum(args, "cost_dtype", &Sinkhorn::cost_dtype, kd::kDtypes);
  args.def_readwrite("cost_batch", &Sinkhorn::cost_batch);
  args.def_readwrite("cost_row", &Sinkhorn::cost_row);
  args.def_readwrite("wide", &Sinkhorn::wide);
  def_pointer(args, "a", &Sinkhorn::a);
  def_pointer(args, "b", &Sinkhorn::b);
  def_pointer(args, "epsilons", &Sinkhorn::epsilons);
  args.def_readwrite("iterations", &Sinkhorn::iterations);
  args.def_readwrite("tolerance", &Sinkhorn::tolerance);
  args.def_readwrite("domain", &Sinkhorn::domain);
  def_pointer(args, "phi", &Sinkhorn::phi);
  def_pointer(args, "psi", &Sinkhorn::psi);
  def_pointer(args, "numbers", &Sinkhorn::numbers);
  def_pointer(args, "phi_history", &Sinkhorn::phi_history);
  def_pointer(args, "psi_history", &Sinkhorn::psi_history);
  def_pointer(args, "d_transport", &Sinkhorn::d_transport);
  def_pointer(args, "d_value", &Sinkhorn::d_value);
  def_pointer(args, "d_plan", &Sinkhorn::d_plan);
  def_pointer(args, "d_phi", &Sinkhorn::d_phi);
  def_pointer(args, "d_psi", &Sinkhorn::d_psi);
  def_pointer(args, "d_cost", &Sinkhorn::d_cost);
  def_pointer(args, "d_a", &Sinkhorn::d_a);
  def_pointer(args, "d_b", &Sinkhorn::d_b);
  args.def_readwrite("threads", &Sinkhorn::threads);

  module.def("sinkhorn", &kd::sinkhorn, py::arg("args"), py::arg("phases"), py::call_guard<py::gil_scoped_release>());
}

void gemm_bf16(int64_t m, int64_t n, int64_t k, uintptr_t a, int64_t a_row, int64_t a_col, uintptr_t b, int64_t b_row,
               int64_t b_col, uintptr_t c, int64_t ldc, bool accumulate, int threads) {
  kd::GemmBf16 args;
  args.m = m;
  args.n = n;
  args.k = k;
  args.a = pointer<const uint16_t>(a);
  args.a_row = a_row;
  args.a_col = a_col;
  args.b = pointer<const uint16_t>(b);
  args.b_row = b_row;
  args.b_col = b_col;
  args.c = pointer<float>(c);
  args.ldc = ldc;
  args.accumulate = accumulate;
  args.threads = threads;
  kd::gemm_bf16(args);
}

void def_gemm(py::module_& module) {
  module.def("gemm_bf16_available", &kd::gemm_bf16_available);
  module.def("gemm_bf16", &gemm_bf16, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a"), py::arg("a_row"),
             py::arg("a_col"), py::arg("b"), py::arg("b_row"), py::arg("b_col"), py::arg("c"), py::arg("ldc"),
             py::arg("accumulate"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.attr("abi_version") = kAbiVersion;
  def_side(module);
  def_row_divergence(module);
  def_gather(module);
  def_pairwise_l1(module);
  def_gibbs(module);
  def_half_step(module);
  def_sinkhorn(module);
  def_sorted_l1(module);
  def_topk(module);
  def_angle(module);
  def_distance(module);
  def_gemm(module);

  module.def("instruction_set", &kd::instruction_set);
  py::list objectives;
  for (int i = 0; i < kd::kObjectives; ++i) objectives.append(kd::objective_name(static_cast<kd::Objective>(i)));
  module.attr("objectives") = py::tuple(objectives);
  module.attr("STATISTICS") = static_cast<unsigned>(kd::kStatistics);
  module.attr("TERMS") = static_cast<unsigned>(kd::kTerms);
  module.attr("GRADIENT") = static_cast<unsigned>(kd::kGradient);
}
