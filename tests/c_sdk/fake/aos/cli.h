#ifndef FAKE_AOS_CLI_H
#define FAKE_AOS_CLI_H

struct cli_command {
    const char *name;
    const char *help;
    void (*function)(char *pcWriteBuffer, int xWriteBufferLen, int argc, char **argv);
};

int aos_cli_register_command(const struct cli_command *command);
int aos_cli_printf(const char *format, ...);

#endif
