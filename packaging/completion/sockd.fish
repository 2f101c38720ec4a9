# fish completion for sockd, and for danted, whose options are the same but for the last two.

for program in sockd danted
    complete -c $program -f
    complete -c $program -s D -d 'Run in the background'
    complete -c $program -s L -d 'Print the licence'
    complete -c $program -s N -x -d 'Number of worker processes'
    complete -c $program -s V -d 'Check the configuration and exit'
    complete -c $program -s d -x -d 'Above 0: log everything in every rule'
    complete -c $program -s f -r -F -d 'Configuration file'
    complete -c $program -s h -d 'Print the options'
    complete -c $program -s n -d 'Do not keep idle connections alive'
    complete -c $program -s p -r -F -d 'File for the process id'
    complete -c $program -s v -d 'Print the version'
    complete -c $program -l add-user -x -d 'Add a user to the password file'
    complete -c $program -l chroot -x -a '(__fish_complete_directories)' -d 'Directory that workers are locked in'
end
