// Which kernels of this program have run: its own symbol table names them.
#include <capo/engine/error.h>
#include <capo/tests/shim/control.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

namespace capo::shim {
namespace {

struct Function {
  std::string file, name;
  const void* address;
};

std::string demangled(const char* symbol) {
  int status = 0;
  char* const text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string name = status == 0 ? text : symbol;
  std::free(text);
  return name;
}

std::uintptr_t load_address() {
  std::uintptr_t at = 0;
  const auto first = [](dl_phdr_info* info, std::size_t, void* to) {
    *static_cast<std::uintptr_t*>(to) = info->dlpi_addr;
    return 1;  // the program comes first
  };
  dl_iterate_phdr(first, &at);
  return at;
}

bool is_kernel_file(const std::string& name) { return name.size() > 3 && name.compare(name.size() - 3, 3, ".cu") == 0; }

// Kernels lie in unnamed namespaces: local symbols, which follow the name of their source file.
void add_functions(const char* image, const Elf64_Shdr& table, const Elf64_Shdr& names, std::vector<Function>& to) {
  const std::uintptr_t base = load_address();
  std::string file;
  for (std::size_t i = 0; i < table.sh_size / sizeof(Elf64_Sym); ++i) {
    Elf64_Sym s;
    std::memcpy(&s, image + table.sh_offset + i * sizeof s, sizeof s);
    const char* const name = image + names.sh_offset + s.st_name;
    if (ELF64_ST_BIND(s.st_info) != STB_LOCAL) return;
    if (ELF64_ST_TYPE(s.st_info) == STT_FILE) file = name;
    if (ELF64_ST_TYPE(s.st_info) == STT_FUNC && is_kernel_file(file))
      to.push_back({file, demangled(name), reinterpret_cast<const void*>(base + s.st_value)});
  }
}

std::vector<Function> functions_of_kernel_files() {
  std::ifstream in("/proc/self/exe", std::ios::binary);
  const std::vector<char> image(std::istreambuf_iterator<char>(in), {});
  Elf64_Ehdr head;
  CAPO_CHECK(image.size() > sizeof head, "shim: cannot read /proc/self/exe");
  std::memcpy(&head, image.data(), sizeof head);
  std::vector<Elf64_Shdr> sections(head.e_shnum);
  std::memcpy(sections.data(), image.data() + head.e_shoff, sections.size() * sizeof(Elf64_Shdr));
  std::vector<Function> functions;
  for (const Elf64_Shdr& s : sections)
    if (s.sh_type == SHT_SYMTAB) add_functions(image.data(), s, sections[s.sh_link], functions);
  return functions;
}

}  // namespace

void write_coverage() {
  const std::filesystem::path folder = CAPO_SHIM_COVERAGE;
  std::filesystem::create_directories(folder);
  const auto file = folder / (std::string(program_invocation_short_name) + ".txt");
  std::ofstream out(file);
  const auto& launched = launched_kernels();
  for (const Function& f : functions_of_kernel_files()) {
    const auto at = launched.find(f.address);
    out << f.file << ' ' << (at == launched.end() ? 0 : at->second) << ' ' << f.name << '\n';
  }
  CAPO_CHECK(out.flush(), "shim: cannot write ", file.string());
}

}  // namespace capo::shim
