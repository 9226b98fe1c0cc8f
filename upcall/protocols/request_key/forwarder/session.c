/* upcall-session: runs a program with a clean environment. pam_exec(8) runs
 * `upcall-session [--without-systemd] PROGRAM [ARGUMENT...]`.
 *
 * --without-systemd: does nothing where systemd is process 1 (sd_booted(3)), whose units start users' daemons.
 *
 * pam_exec passes on PAM's environment, which a user may influence (pam_env with user_readenv, sshd's
 * PermitUserEnvironment). It runs as root without AT_SECURE, so the dynamic loader obeys LD_PRELOAD and similar
 * variables in every program it loads, including env(1) and shells. Therefore this program must be linked statically.
 */
#include <stddef.h>
#include <string.h>
#include <unistd.h>

static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
static char lang[] = "LANG=C.UTF-8";
static const char *const kept[] = {"PAM_TYPE=", "PAM_USER=", "PAM_SERVICE="};

enum { KEPT = sizeof kept / sizeof *kept, EX_USAGE = 64, EX_UNAVAILABLE = 69 };

int main(int argc, char **argv, char **environment)
{
	char *clean[KEPT + 3] = {path, lang};
	size_t count = 2;

	if (argc == 2 && strcmp(argv[1], "--version") == 0)
		return write(STDOUT_FILENO, "upcall-session\n", 15) != 15;
	if (argc > 2 && strcmp(argv[1], "--without-systemd") == 0) {
		if (access("/run/systemd/system", F_OK) == 0)
			return 0;
		argv++;
		argc--;
	}
	if (argc < 2 || argv[1][0] != '/')
		return EX_USAGE;
	for (size_t name = 0; name < KEPT; name++)
		for (char **one = environment; *one != NULL; one++)
			if (strncmp(*one, kept[name], strlen(kept[name])) == 0) {
				clean[count++] = *one;
				break;
			}
	execve(argv[1], argv + 1, clean);
	return EX_UNAVAILABLE;
}
